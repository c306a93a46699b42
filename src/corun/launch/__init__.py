"""Starting, arming, watching and stopping the processes of a run."""
