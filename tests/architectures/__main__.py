from tests.architectures.command import main

main()
