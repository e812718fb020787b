"""Programs that show jflash at work; the tests run them."""
