"""Real machines: a kit of certificates and keys, the server, and the devices that join it, over Flower."""
