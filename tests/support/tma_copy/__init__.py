"""An op whose kernel reads and writes through TMA descriptors that its host function makes."""
