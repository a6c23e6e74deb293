"""The part of boto3 that the AWS example calls. The value of a secret is its name and `-value`."""


class client:
    def __init__(self, service: str, region_name: str) -> None:
        assert service == "secretsmanager"

    def get_secret_value(self, SecretId: str) -> dict[str, str]:
        return {"SecretString": f"{SecretId}-value"}
