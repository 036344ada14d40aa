"""Photos: reading a library, finding faces, drawing faces whose truth is known. Knows no models."""
