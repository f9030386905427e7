"""What all panels share: state, controls, worker thread, HTML, colours."""
