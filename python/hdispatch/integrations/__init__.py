"""Drop-ins for programs that call other libraries' ops."""
