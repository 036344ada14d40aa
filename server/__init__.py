"""What the coordinator installs."""
