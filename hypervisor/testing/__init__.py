"""Guests under pytest: the plugin, the machines that tests get, and the guest's side of them."""
