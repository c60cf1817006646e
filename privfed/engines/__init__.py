"""Engines carry bytes between a coordinator and its sites, and know nothing of what they mean.

The contract
------------
An engine has one method, ``exchange(requests, deadline_seconds)``: it hands each named site its request and gives
back the replies that came in time, by name. Every engine promises the following, and ``tests/privfed/engines/`` has
one suite that all of them pass.

1. **Exact bytes.** A site's handler gets the bytes that were sent to that site, and the coordinator the bytes that it
   returned: nothing added, split, decoded or compressed in a way that shows. Empty messages, and those of many
   megabytes, count.
2. **Names.** Only the sites in ``requests`` are asked, each with its own request. Replies are keyed by those names
   alone. A site's name is the one that the engine authenticated (in a deployment: the subject of its certificate),
   never one that the site claims in a message.
3. **The deadline is ours.** ``exchange`` returns when every site has replied, or is known to be gone, and at the
   latest when the deadline has passed. A reply that comes later is dropped: it is never the reply to another request.
4. **Dropouts are no errors.** A site that is unknown, down, dies while it works, or is late has no key in the result.
   It delays nobody beyond the deadline and changes nobody else's reply. ``exchange`` does not raise for a site.
5. **Order.** A site works on one request at a time, in the order of the exchanges.
6. **At most once.** An engine never sends a request again by itself. (Whether a lost round is done again is the
   federation's decision; sites answer a step once, whatever an engine does.)
7. **Refusals are replies.** A site that will not, says so in its own bytes. An engine never makes up a reply and
   never hides one.
8. **Silence.** No payload, in whole or part, is written to a log, a file or an error message.

What an engine does *not* promise: that a reply is honest, that sites see the same requests, that a message arrives at
all. Those are for the protocols above it.

Handlers keep their side: ``handle`` gives bytes for whatever bytes come, and never raises.

Three engines: `local` (one process), `nvflare` (NVIDIA FLARE; deployments) and `flower` (a Flower federation that is
there already). Over Flower a site has no process that lives, and so no handler: a function gets what was kept for it.
"""
