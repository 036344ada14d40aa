"""Networks: generator, discriminator, and how their weights become one vector or one file."""
