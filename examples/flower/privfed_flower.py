"""Nothing of its own: what answers is the privfed that the site, and the coordinator, have installed."""

from privfed.deployment import flower

client = flower.client
server = flower.server
