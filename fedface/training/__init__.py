"""One round of learning on one library."""
