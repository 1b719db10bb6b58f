"""Programs made of the other rooms: selecting data, labelling by AI feedback, filtering samples."""
