"""What one site holds, and the keyed hash that decides which record is for what."""

import hashlib
import hmac
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SiteData:
    """One site's records. Nothing here leaves the site.

    Args:
        ids: str[n], unique within the site: a record keeps its id whatever else is in the table.
        inputs: float32[n, F], standardised from public ranges.
        targets: int64[n].
    """

    ids: tuple[str, ...] = field(repr=False)
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, mask: NDArray[np.bool_]) -> "SiteData":
        """The records where ``mask`` bool[n] is true."""
        keep = torch.from_numpy(np.flatnonzero(mask))
        return SiteData(tuple(np.asarray(self.ids)[mask]), self.inputs[keep], self.targets[keep])

    def fingerprint(self, key: bytes) -> str:
        """Hex HMAC-SHA256 of the records: names the data set in a ledger, and tells nothing without the site's key."""
        digest = hmac.new(key, digestmod=hashlib.sha256)
        for record in self.ids:
            encoded = record.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        digest.update(self.inputs.numpy().tobytes() + self.targets.numpy().tobytes())
        return digest.hexdigest()


def keyed_fraction(ids: tuple[str, ...], *, seed: int, label: str) -> NDArray[np.float64]:
    """float64[n] in [0, 1): where each record falls, by a hash of its own id alone.

    A shuffled split depends on every record: one more patient moves the others between support and query, and parallel
    composition no longer holds. A keyed hash gives each record its place whatever the others are.
    """
    key = f"privfed split {seed} {label}".encode()
    words = (hmac.digest(key, record.encode(), "sha256")[:8] for record in ids)
    return np.array([int.from_bytes(word, "big") / 2**64 for word in words])
