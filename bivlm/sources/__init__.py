"""Whatever comes from outside: models, data sets, images, chat templates."""
