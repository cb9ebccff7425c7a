"""An op whose kernel reads both factors of a matrix product by TMA, one of them column-major, of any size."""
