"""A consortium of hospitals on a real engine: its files, its sites, its coordinator. Each module holds one of these."""
