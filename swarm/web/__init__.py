"""What the HTTP faces of a swarm share: a server that ends in order, and bounds on what strangers may send."""
