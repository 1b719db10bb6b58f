"""Programs made of the other packages: selecting data, labelling by AI feedback, filtering samples."""
