"""Ways onto the wire: each takes calls off a transport and asks `service.rpc`."""
