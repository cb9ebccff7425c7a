"""The command line: `hdispatch build | inspect | doctor | bench`. Each module declares its arguments and runs them."""
