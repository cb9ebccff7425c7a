"""The command line: `hdispatch build | inspect | doctor | bench | tune | record`. Each module declares and runs its own."""
