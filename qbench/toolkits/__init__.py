"""Other toolkits: what they decide about a network, read out of their results and put on the network here."""
