"""The Flower app of a device."""
