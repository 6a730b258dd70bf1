"""What quantizing a layer costs, and which bit widths to choose: no result passes through it but those of `mixed`."""
