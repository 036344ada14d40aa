"""The local web page: a person drops a photo, pixelates it, and watches faces appear that fit the pixels."""
