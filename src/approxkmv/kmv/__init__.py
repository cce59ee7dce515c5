"""Algorithms 1 to 3 of Indyk, Kapralov, Sheth & Wagner (ICLR 2025), with what they are built from."""
