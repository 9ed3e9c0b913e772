"""Networks: encoders, U-Nets and the heads of the methods."""
