"""The command line: `hdispatch build | inspect | doctor | bench | tune`. Each module declares its arguments and runs them."""
