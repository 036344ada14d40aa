"""What crosses between server and devices, who answers, and how rounds run."""
