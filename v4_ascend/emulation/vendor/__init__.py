"""CPU stand-ins for the vendor's operators, written from the vendor's documents."""
