"""Products of Gaussian kernel matrices with vectors, for use: with an error bar, and exact where that is cheaper."""
