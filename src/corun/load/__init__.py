"""Clients: the open-loop sender, the closed loop, their record rings, and the session that runs them."""
