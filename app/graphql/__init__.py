"""The GraphQL surface: the endpoint, its limits, and the schema over the actions. It decides no rule of the domain."""
