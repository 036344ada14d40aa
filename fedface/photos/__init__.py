"""Photos: reading a library, finding and aligning faces, skin tone, occasions."""
