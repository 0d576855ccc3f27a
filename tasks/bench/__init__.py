"""`adalink bench`: how fast this machine trains and answers, against the peers, side by side in one run."""
