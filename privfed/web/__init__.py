"""A page that shows a run as it goes: read-only, from its folder alone, for browsers on this machine."""
