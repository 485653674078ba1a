"""What people look at in a browser: from files of the package, without an account, a database or
anything from outside."""
