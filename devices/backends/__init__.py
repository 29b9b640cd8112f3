"""What device models stand on: files, sockets and network interfaces of the host. They know nothing of guests."""
