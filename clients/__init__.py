"""What the owner of a device installs."""
