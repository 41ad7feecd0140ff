"""HTTP: the application, its routes and bodies, connections."""
