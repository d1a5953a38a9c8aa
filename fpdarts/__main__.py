from fpdarts.cli import main

main()
