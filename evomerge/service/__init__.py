"""The service: the controller's loop and what people see of it."""
