"""Networks: generator, critic, and how their weights become one vector or one file."""
