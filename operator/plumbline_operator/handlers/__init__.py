"""What kopf calls. Handlers take an object in and put a key into the queue; they decide nothing."""
