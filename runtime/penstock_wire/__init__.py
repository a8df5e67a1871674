"""What processes say to each other: messages, sockets, block hashes, names."""
