"""Who masks with whom and who holds whose shares."""


def neighbours(members: tuple[int, ...], client: int) -> tuple[int, ...]:
    """The complete graph: everyone holds a share of everyone's secrets, itself included (Bonawitz et al. 2017).

    Args:
        members: the clients that advertised keys, increasing.
        client: one of them.

    Returns:
        Its neighbours, increasing; "neighbours" counts self because a dealer keeps one of its own shares.
    """
    if client not in members:
        raise ValueError(f"client {client} is not among the members")
    return members
