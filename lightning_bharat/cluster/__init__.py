"""Where ranks run: started warm on this host, supervised, queued, launched on others."""
