"""The one table of tolerances."""

# Relative to the largest number compared. Whole numbers must be equal. Widen none of them to make a test pass.
# bfloat16 has 8 bits: four times the distance of neighbouring numbers, 2 ** -7, for a few layers of products.
TOLERANCE = {"float64": 1e-6, "float32": 2e-5, "bfloat16": 2.0**-5}
