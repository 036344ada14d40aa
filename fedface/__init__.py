"""fedface: improve face generators and upsamplers with photos that never leave their devices."""

__version__ = "0.1.0"
