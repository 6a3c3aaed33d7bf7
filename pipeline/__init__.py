"""SAE Census: corpus statistics of sparse-autoencoder features."""
