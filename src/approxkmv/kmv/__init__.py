"""Algorithms 1 to 3 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025) and their building blocks."""
