"""URLs that may contain secrets, in all forms that clients accept, and harmless URLs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f.data_pipeline.urls import REMOVED, url_problem, without_secrets

HARMLESS = [
    "http://mlflow:5000",
    "https://storage.googleapis.com",
    "https://[::1]:8080/x",
    "https://host/a/b%40c",
    "postgresql://db:5432/mlflow",
    "databricks://profile",
    "databricks",
    "mlflow-artifacts:/x",
    "ray://head:10001",
    "10.0.0.1:6379",
    "auto",
    "s3://bucket/runs@2/a b",
    "s3://bucket",
    "sqlite:////home/me@corp/my runs/mlflow.db",
    "file:///home/me@corp/x",
    "file:/home/me@corp/x",
    "/data/me@corp/x:y",
    "runs/a@b",
    "C:\\data",
    "hf-hub:timm/resnet50.a1_in1k@main",
    "resnet50.a1_in1k",
    "",
]
SECRET = [
    ("https://tophush@host/x", "https://host/x"),
    ("https://me:tophush@host:80", "https://host:80"),
    ("https://:tophush@host", "https://host"),
    ("https://tophush:@host", "https://host"),
    ("https://me:top/hush@host/x", "https://host/x"),
    ("https://me:top@hush@host/x", "https://host/x"),
    ("https://me:top?hush@host/x", "https://host/x"),
    ("https://me:top#hush@host/x", "https://host/x"),
    ("https://me:80/tophush@host/x", "https://host/x"),  # a parser sees port and path, a reader user and password
    ("https://me/tophush@host", "https://host"),
    ("https://tophush%40host/x", REMOVED),
    ("https://tophush\uff20host/x", REMOVED),  # a full-width @, which some clients accept as @
    ("https://me:tophush/x", REMOVED),
    ("https:\\\\me:tophush@host", REMOVED),
    ("https://host\\me:tophush@other", "https://other"),
    ("https:/tophush@host", REMOVED),
    ("https:tophush@host", REMOVED),
    ("me:tophush@host/db", REMOVED),
    ("me:top/hush@host", REMOVED),
    ("//tophush@host/x", REMOVED),
    (" https://tophush@host", "https://host"),
    ("\x01https://tophush@host", "https://host"),
    ("ht\ntps:/\t/tophush@host", "https://host"),
    ("https://host/x?token=tophush", "https://host/x"),
    ("https://host?tophush", "https://host"),
    ("https://host/x#access_token=tophush", "https://host/x"),
    ("https://host/x;password=tophush", "https://host/x"),
    ("mysql+pymysql://me:tophush@host/db", "mysql+pymysql://host/db"),
    ("mysql+pymysql://me:top%2Fhush@host/db", "mysql+pymysql://host/db"),
    ("postgresql://host/db?password=tophush", "postgresql://host/db"),
    ("mssql+pyodbc:///?odbc_connect=PWD%3Dtophush", "mssql+pyodbc:///"),
    ("sqlite:///x.db?key=tophush", "sqlite:///x.db"),
    ("redis://:tophush@host", "redis://host"),
    ("jdbc:postgresql://host/db?password=tophush", REMOVED),
    ("see https://tophush@host", REMOVED),
    ("https://a.com/,https://tophush@b.com", "https://b.com"),
    ("s3://a/b,https://tophush@host", "s3://host"),
    ("s3://AKIA:top/hush@bucket/x", "s3://bucket/x"),
    ("s3://AKIA:12345/tophush@bucket/x", "s3://bucket/x"),
    ("s3://tophush@bucket/x@y", "s3://bucket/x@y"),
    ("s3://bucket/x?X-Amz-Signature=tophush", "s3://bucket/x"),
    ("s3://bucket/a@b?X-Amz-Signature=tophush", "s3://bucket/a@b"),
    ("file://tophush@host/x", "file://host/x"),
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_are_unchanged(text):
    assert url_problem(text) is None
    assert without_secrets(text) == text


@pytest.mark.parametrize(("text", "redacted"), SECRET)
def test_urls_that_may_contain_secrets_are_refused_and_redacted(text, redacted):
    problem = url_problem(text)
    assert problem is not None
    assert "hush" not in problem
    assert without_secrets(text) == redacted


USERS = st.text(st.characters(exclude_characters="@", min_codepoint=33, max_codepoint=126), min_size=1)


@given(user=USERS, scheme=st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]), tail=st.text("abc/:.8"))
def test_urls_with_text_before_an_at_sign_are_refused(user, scheme, tail):
    text = f"{scheme}://{user}@host{tail}"
    assert url_problem(text) is not None


@given(st.text(st.sampled_from("ab:/@?#;\\ \n\t[]%s3+.1"), max_size=20))
def test_redacted_urls_are_harmless(text):
    redacted = without_secrets(text)
    assert url_problem(redacted) is None
    assert without_secrets(redacted) == redacted
